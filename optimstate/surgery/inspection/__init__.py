"""What a checkpoint holds, alone or beside others."""
