"""Training methods: the nets, the updates and the losses of each."""
