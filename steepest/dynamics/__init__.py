"""See what training does, measured and predicted: margins and implicit bias, alignment."""
