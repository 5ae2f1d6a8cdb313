"""How well networks learn by RLS, SGD and Adam."""
