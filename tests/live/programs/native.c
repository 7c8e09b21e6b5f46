/* Tells addresses of code of all kinds, waits for a line, loads a library, tells its address, waits. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>

__attribute__((noinline)) int own_function(int number)
{
	return number * 3;
}

int main(int count, char **arguments)
{
	char line[8];
	void *made = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS,
			  -1, 0);
	void *library;

	if (count < 2 || made == MAP_FAILED)
		return 1;
	puts("ready");
	printf("[%lu, %lu, %lu, %lu, %lu]\n", (unsigned long)own_function,
	       (unsigned long)dlsym(RTLD_DEFAULT, "getppid"), (unsigned long)made,
	       getauxval(AT_SYSINFO_EHDR), (unsigned long)line);
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 0;
	library = dlopen(arguments[1], RTLD_NOW);
	if (!library)
		return 2;
	printf("[%lu, %lu]\n", (unsigned long)dlsym(library, "public_name"),
	       (unsigned long)dlsym(library, "in_assembler"));
	fflush(stdout);
	return own_function(fgets(line, sizeof(line), stdin) != NULL);
}
