"""What tools/export_model.py is made of."""
