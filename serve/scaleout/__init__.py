"""Many replicas behind one address, on Ray Serve. What decides is pure; what is Ray's stays Ray's."""
