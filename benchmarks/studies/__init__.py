"""Studies of one question each, apart from the measurements that the report shows."""
