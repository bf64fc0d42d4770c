"""A run folder: written and read back (`folder`), shown as a `table`, in other formats (`export`)
and in figures (`plots`: `dots` and `front`, in one `style`)."""
