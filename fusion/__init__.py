"""Experts become teachers, teachers make one student."""
