"""Reading new pages with a trained model: tables, text, and annotated pictures."""
