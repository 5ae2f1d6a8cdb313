"""What training by many processes costs."""
