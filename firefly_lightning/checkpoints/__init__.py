"""What a checkpoint holds, and how it is written whole and read under any strategy."""
