from resblock_bench.bench.cli import main

if __name__ == "__main__":
    main()
