"""Whether an answer is right: exact numbers, programs in a sandbox, a user's function; shares of right answers."""
