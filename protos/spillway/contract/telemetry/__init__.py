"""What a node and the dispatcher tell of themselves, in the same ways: metrics, trace context, logs, and how they leave the
process. Nothing here counts; whoever does keeps plain integers and hands them over when somebody asks."""
