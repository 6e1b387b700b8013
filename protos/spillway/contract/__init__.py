"""What clients and brokers must agree on and protobuf cannot say."""
