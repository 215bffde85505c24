"""diffaccel.zoo"""
