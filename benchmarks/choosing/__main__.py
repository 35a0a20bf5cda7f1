from benchmarks.choosing.cli import main

main()
