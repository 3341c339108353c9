/* The init of scripts/guest-test.sh: loads all that /etc/modules lists, looks around, and turns the machine off. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

static int faults;

static void check(int ok, const char *what)
{
    if (ok)
        return;
    printf("%s: %s\n", what, strerror(errno));
    faults++;
}

static void load_modules(void)
{
    char path[256];
    FILE *list = fopen("/etc/modules", "r");

    while (list && fgets(path, sizeof path, list)) {
        int fd;

        path[strcspn(path, " \n")] = 0;
        fd = open(path, O_RDONLY | O_CLOEXEC);
        check(fd >= 0 && (syscall(SYS_finit_module, fd, "", 0) == 0 || errno == EEXIST), path);
    }
}

static void find_file_systems(void)
{
    static const char *wanted[] = { "virtiofs", "overlay", "erofs", "ext4", "cgroup2", "hugetlbfs", "mqueue" };
    char known[4096] = "", word[64];
    FILE *list = fopen("/proc/filesystems", "r");

    while (list && fscanf(list, "%63s", word) == 1) {
        strcat(known, " ");
        strcat(known, word);
    }
    strcat(known, " ");
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        snprintf(word, sizeof word, " %s ", wanted[i]);
        errno = ENODEV;
        check(strstr(known, word) != NULL, wanted[i]);
    }
}

int main(void)
{
    load_modules();
    check(mount("proc", "/proc", "proc", 0, NULL) == 0, "/proc");
    check(mount("sys", "/sys", "sysfs", 0, NULL) == 0, "/sys");
    find_file_systems();
    check(access("/sys/bus/virtio/devices/virtio0/driver", F_OK) == 0, "a virtio device with a driver");
    check(access("/sys/class/vsock", F_OK) == 0 || access("/sys/class/misc/vsock", F_OK) == 0, "vsock");
    check(access("/bin/crun", X_OK) == 0, "/bin/crun");
    check(access("/bin/sh", X_OK) == 0, "/bin/sh of initrd-debug");
    printf(faults ? "guest not ok\n" : "guest ok\n");
    fflush(stdout);
    tcdrain(1);
    reboot(RB_POWER_OFF);
    return 1;
}
