"""How nodes reach each other: one connection for each pair of nodes, for all groups."""
