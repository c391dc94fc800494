"""What a model's name means here: inputs, widths, stand-ins, and what is opened for it."""
