"""Colours of plots and pictures: the palette of Okabe and Ito, which is safe for colour-blind readers.

https://jfly.uni-koeln.de/color
"""

BLACK, GRAY = "#000000", "#808080"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY_BLUE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
)  # fmt: skip
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY_BLUE)
