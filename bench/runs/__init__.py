"""A run folder: written and read back (`folder`), shown as a `table`, in other formats (`export`)
and as figures (`plots`: `dots` and `front`, in one `style`)."""
