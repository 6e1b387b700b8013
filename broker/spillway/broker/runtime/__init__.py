"""The core at work: leaders' turns, consumers, timers, forwarding."""
