"""What ``stability_report.py`` measures, finds, draws and writes."""
