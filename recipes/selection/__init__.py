"""Visual-gain selection: which questions does seeing the future help with?"""
