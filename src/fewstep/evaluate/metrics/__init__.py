"""The metrics that ship, one module each. The name of a module is the metric's name on the command line."""
