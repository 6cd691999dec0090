/* A JVM with a large heap, which answers requests as heap_program.py does.
 *
 *     java -Xmx... HeapProgram.java BASE COUNT BYTES
 */
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.Map;
import java.util.zip.CRC32;

public class HeapProgram {
    /** Moves the values of neighbouring numbers far apart. */
    static final long SPREAD = 2654435761L;

    public static void main(String[] words) throws Exception {
        byte[] base = Files.readAllBytes(Path.of(words[0]));
        int count = Integer.parseInt(words[1]), size = Integer.parseInt(words[2]);
        Map<Integer, byte[]> heap = new HashMap<>();
        for (int number = 0; number < count; number++) {
            byte[] value = new byte[size];
            System.arraycopy(base, (int) (number * SPREAD % (base.length - size)), value, 0, size);
            heap.put(number, value);
        }
        System.out.println("ready");
        BufferedReader asked = new BufferedReader(new InputStreamReader(System.in));
        for (String line = asked.readLine(); line != null; line = asked.readLine())
            System.out.println(line.equals("digest") ? digest(heap) : "pong");
    }

    /** The checksum of all values, which touches every page of them. */
    static String digest(Map<Integer, byte[]> heap) {
        CRC32 found = new CRC32();
        for (byte[] value : heap.values())
            found.update(value);
        return String.format("%08x", found.getValue());
    }
}
