"""What a call costs, and where: time by kernel family, memory."""
