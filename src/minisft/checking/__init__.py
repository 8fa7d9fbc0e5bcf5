"""Proofs, on the user's own recipe, model and machine, that training does what it promises."""
