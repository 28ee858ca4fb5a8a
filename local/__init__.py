"""What one machine has instead of servers: PostgreSQL, Redis and a supervisor. Knows no rules of the hub."""
