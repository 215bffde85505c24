"""diffaccel"""
