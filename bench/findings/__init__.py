"""What is not as expected (`findings`), and how it is written: a table, Markdown, JSON, JUnit
(`report`)."""
