"""The prompt sets that ship, one module each. The name of a module is the prompt set's name."""
