"""Raft groups on pysyncobj, made safe for acknowledged data. Nothing outside of this package touches pysyncobj.

    seam     the pinned library and the names of its parts that the adapter uses
    journal  every group's log and hard state in one RocksDB
    replica  one group's SyncObj, driven from outside, with the safety rules around its transport
    wire     our own encoding of its messages
    host     all groups of a node: one turn, one write, one fsync
"""
