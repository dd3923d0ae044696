"""One line in each trainer: a module for each framework, imported only where that framework is."""
