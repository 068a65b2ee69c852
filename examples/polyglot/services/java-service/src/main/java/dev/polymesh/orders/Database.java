package dev.polymesh.orders;

import com.zaxxer.hikari.HikariDataSource;
import java.net.URI;
import java.net.URLDecoder;
import java.nio.charset.StandardCharsets;
import javax.sql.DataSource;
import org.flywaydb.core.Flyway;
import org.springframework.boot.autoconfigure.condition.ConditionalOnProperty;
import org.springframework.context.annotation.Bean;
import org.springframework.context.annotation.Configuration;
import org.springframework.core.env.Environment;
import org.springframework.jdbc.core.simple.JdbcClient;
import org.springframework.jdbc.datasource.DataSourceTransactionManager;
import org.springframework.transaction.PlatformTransactionManager;
import org.springframework.transaction.annotation.EnableTransactionManagement;

/**
 * PostgreSQL, which lies outside the cluster. Without ORDERS_DATABASE_URL the service runs without orders. With it, the
 * service starts once the tables are there, and Kubernetes tries again until then.
 */
@Configuration
@ConditionalOnProperty("ORDERS_DATABASE_URL")
@EnableTransactionManagement
class Database {

    @Bean
    HikariDataSource dataSource(Environment environment) {
        Login login = Login.of(environment.getRequiredProperty("ORDERS_DATABASE_URL"));
        HikariDataSource source = new HikariDataSource();
        source.setJdbcUrl(login.url());
        source.setUsername(login.user());
        source.setPassword(login.password());
        source.setMaximumPoolSize(5);
        source.setConnectionTimeout(5_000);
        return source;
    }

    @Bean(initMethod = "migrate")
    Flyway flyway(DataSource source) {
        return Flyway.configure().dataSource(source).load();
    }

    @Bean
    PlatformTransactionManager transactionManager(DataSource source) {
        return new DataSourceTransactionManager(source);
    }

    @Bean
    OrderStore orderStore(DataSource source, Flyway migrated) {
        return new OrderStore(JdbcClient.create(source));
    }

    /** What JDBC wants of postgresql://user:password@host:port/database?options. */
    record Login(String url, String user, String password) {
        static Login of(String text) {
            URI uri = URI.create(text);
            if (!"postgresql".equals(uri.getScheme()) || uri.getHost() == null) {
                throw new IllegalArgumentException("ORDERS_DATABASE_URL is not postgresql://user:password@host:port/database");
            }
            String[] who = uri.getRawUserInfo() == null ? new String[0] : uri.getRawUserInfo().split(":", 2);
            String port = uri.getPort() < 0 ? "" : ":" + uri.getPort();
            String options = uri.getRawQuery() == null ? "" : "?" + uri.getRawQuery();
            return new Login("jdbc:postgresql://" + uri.getHost() + port + uri.getRawPath() + options,
                    who.length > 0 ? decode(who[0]) : null, who.length > 1 ? decode(who[1]) : null);
        }

        private static String decode(String text) {
            return URLDecoder.decode(text.replace("+", "%2B"), StandardCharsets.UTF_8);
        }
    }
}
