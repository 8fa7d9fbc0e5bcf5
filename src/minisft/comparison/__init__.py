"""One recipe in several variants, each a run of its own in a process of its own, and what they measured."""
