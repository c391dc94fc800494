"""What a configuration may say, and what older ones said."""
