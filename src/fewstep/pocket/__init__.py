"""The embedded model Pocket: data, text encoders, training and evaluation."""
