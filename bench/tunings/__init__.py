"""Times of the launches that each op's heuristic chooses from."""
