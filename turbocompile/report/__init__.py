"""What was done to a model and why not more: rows, tables, one page of HTML."""
