"""What stands around the calls: who may come in, what is read, what operators may ask."""
