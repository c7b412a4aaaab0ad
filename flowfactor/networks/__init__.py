"""What potentials and fields are both made of: stacked layers, their closed-form derivatives and these' adjoints."""
