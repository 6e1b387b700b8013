"""Raft groups on pysyncobj, made safe for acknowledged data. Nothing outside of this package touches pysyncobj.

    seam       the pinned library, its clock and its chance
    engine     SyncObj with the closed list of overrides
    guard      the safety rules around what it sends and receives, pure
    progress   what a leader knows of one follower
    group      one replica of one group: engine, guard, elections, transfer
    recovery   how a replica that lost its disk comes back, and why that is safe
    journal    every group's log and hard state in one store
    formation  is a blank store new, or did it lose its disk?
    wire       our own encoding of its messages
    claims     who leads the groups that have no replica here
    host       all groups of a node: one turn, one write, one sync
"""
