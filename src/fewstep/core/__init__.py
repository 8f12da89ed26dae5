"""Flow mathematics, samplers and what every layer needs; numpy alone."""
