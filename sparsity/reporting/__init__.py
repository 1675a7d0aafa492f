"""Reporting: results of several runs in one table and one page."""
