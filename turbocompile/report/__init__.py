"""What the passes did to a model, and why they left sites alone: rows, tables, one page of HTML."""
