"""What only a GPU can show; every test is skipped by name where there is none."""
