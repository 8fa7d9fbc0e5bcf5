"""Memory and time before training: what a recipe needs under each strategy, and which strategy to take."""
