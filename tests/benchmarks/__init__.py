"""Speed, in ratios: `make bench`. Each module measures one part; `__main__` prints the table and the JSON."""
