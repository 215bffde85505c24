"""diffaccel.families"""
