from benchmarks.accuracy.cli import main

main()
