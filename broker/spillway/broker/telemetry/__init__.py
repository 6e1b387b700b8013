"""What a node tells of itself. `registry` defines every metric once; `meters` counts; `collect` gathers what is told; `walk` finds
what no counter knows; `tracing` makes spans of sampled messages. Nothing in here is on a message's way unless a setting asks
for it, and then it is integers."""
