"""The migration language: rules that say which state goes to which parameter."""
